"""The link between a gateway at the edge and one in the cloud: one WebSocket for all sessions of the edge.

In reading order: `codec` (values as bytes), `frames` (what travels, as tables), `channel` (one connection: queues,
pings, what is dropped), `client` (the edge's uplink), `server` (the cloud's relay), `keys` (who may link).
"""
