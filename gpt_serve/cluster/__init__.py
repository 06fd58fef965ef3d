"""The same routes and the same engine on Ray Serve: a node more is its throughput more, a node less loses no answer.

::

    client -> Ray's proxy -> front.py: the routes of serve/app.py -> routing.py: which replica -> replica.py: the engine
                             asks again if the replica dies       <-----------------------------  an Answer or a Failure
"""
