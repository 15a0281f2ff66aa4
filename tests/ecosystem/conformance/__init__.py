"""Are answers under a JSON Schema valid? See `__main__`.

sources   schemas: JSON-Schema-Test-Suite, SchemaStore
offline   grammars without a model                      checking  jsonschema's judgement of a text
answers   a running stack is asked                      report    counts, as tables
"""
