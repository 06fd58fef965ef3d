import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own use of pydantic, at import
    import ray.serve  # noqa: F401
