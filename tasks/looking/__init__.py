"""Events by looking, where nobody pushes: S3 prefixes, SQS queues, databases, Kafka topics."""
