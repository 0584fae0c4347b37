"""A whole Outrider on one machine: Kafka, Redis and the services as processes of their own.

Behind `outrider up`, `down`, `status` and `demo`, and behind the tests and the bench. Nothing that a service needs.
"""
