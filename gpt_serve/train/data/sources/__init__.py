"""Where labelled images come from, a module each; `gpt_serve.train.data.datasets` decides which."""
