"""The OpenAI-compatible HTTP API.

    HTTP --Endpoint--> body --> Fields --> completions, chats --> requests --> calls --> Frontend
    HTTP <--Endpoint-- JSON, or server-sent events <-- *_responses <-- events <----------'

It knows no workers and no queues: it calls the frontend, as the other protocols do.
"""
