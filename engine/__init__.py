"""What both panels share: types, configuration, the wire, KV blocks, model and the one step loop.

The modules `types`, `errors`, `config`, `precision`, `seeds`, `lifeline`, `pb`, `rpc`, `telemetry`,
`checkpoint` and `cache.layout` never import torch: they are all that the coordinator may use.
"""
