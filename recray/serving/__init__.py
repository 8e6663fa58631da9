"""A run or a bundle over HTTP (`recray serve`).

    service.py   the model that is served, its swap, and requests in batches
    door.py      what every request passes: admission, token, metrics, the log
    app.py       the routes and their errors
    schemas.py   what requests and answers look like
    answers.py   requests of one shape, answered together
    server.py    address, token and the server's life

Needs the extra `serve`. README.md in this folder is the page "From a run to your product".
"""
