"""What is deployed: `prefect.yaml`, and what it needs on the worker's side."""
