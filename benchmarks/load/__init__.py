"""The load generator: a process that plays a plan against an endpoint and notes every arrival."""
