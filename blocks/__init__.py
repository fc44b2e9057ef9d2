"""Prefect blocks: one per tool, with its settings, its secrets and a typed client for its API."""

from blocks.airbyte import AirbyteServer
from blocks.census import CensusCredentials
from blocks.fivetran import FivetranCredentials
from blocks.hightouch import HightouchCredentials
from blocks.http_job import HttpJob
from blocks.kafka import KafkaCluster
from blocks.pagerduty import PagerDutyRouting
from blocks.receiver import (
    AirbyteWebhook,
    CensusWebhook,
    DbtCloudWebhook,
    FivetranWebhook,
    GitWebhook,
    PagerDutyWebhook,
    S3Webhook,
    SignedWebhook,
    SlackCommand,
)

__all__ = [
    "AirbyteServer",
    "AirbyteWebhook",
    "CensusCredentials",
    "CensusWebhook",
    "DbtCloudWebhook",
    "FivetranCredentials",
    "FivetranWebhook",
    "GitWebhook",
    "HightouchCredentials",
    "HttpJob",
    "KafkaCluster",
    "PagerDutyRouting",
    "PagerDutyWebhook",
    "S3Webhook",
    "SignedWebhook",
    "SlackCommand",
]
