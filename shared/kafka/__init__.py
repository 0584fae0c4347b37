"""What lies under the bus: the two Kafka requests on the path of a round, done lean, and the rest through aiokafka.

aiokafka's own producer and consumer wake five tasks for a message each way: 1.1 ms of CPU per message, half of a hop.
So a message goes out (`producer`) and comes in (`fetcher`) over `wire`, which costs 0.25 ms, while metadata, topics,
group membership and offsets, none of them on the path, stay with aiokafka (`cluster`, `reader`).
"""
