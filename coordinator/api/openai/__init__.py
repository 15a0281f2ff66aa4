"""The OpenAI-compatible HTTP API: a stateless client of the coordinator's own gRPC API.

    HTTP --door--> body --> Fields --> completions, chats --> gRPC requests --> calls
    HTTP <--door-- JSON, or server-sent events <-- completion_answers, chat_answers <--'

Nothing here knows of workers, queues or models beyond what any gRPC client could know.
"""
