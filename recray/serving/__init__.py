"""A run or a bundle over HTTP (`recray serve`).

    service.py   the model that is served, its swap, and requests in batches
    app.py       the routes, their schemas, errors and metrics
    server.py    address, token and the server's life

Needs the extra `serve`. README.md in this folder is the page "From a run to your product".
"""
