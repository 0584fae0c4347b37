"""What lies under the bus: the two Kafka requests on the path of a round, done lean, and the rest through aiokafka.

aiokafka's own producer and consumer pass a message through five tasks each way, which is half of what a hop costs. So
a message leaves (`producer`) and arrives (`fetcher`) over `wire` within one callback, while metadata, topics, group
membership and offsets, none of them on the path of a round, stay with aiokafka (`cluster`, `reader`).

A block to a member of a group that reads 12 partitions, and its verdict back; two processes and Apache Kafka 4.3.1 on
two cores that had other work too; medians of four alternating runs:

| | aiokafka | lean |
|---|---|---|
| round trip, p50 / p95, one after another | 6.1 / 11.2 ms | 3.6 / 7.7 ms |
| round trip, p50 / p95, one every 20 ms | 8.0 / 17.1 ms | 4.8 / 9.3 ms |
| CPU per round trip in each process, one after another | 1.7 ms | 0.8 ms |

Reading by explicit partitions or as a member of a group makes no difference, and uvloop none that could be measured
(3.2 against 3.4 ms), so it is not used. Most of what is left is the broker, and the system calls that wake it.
"""
