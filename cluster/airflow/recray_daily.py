"""Every day: wait for the feature pipeline's Parquet, run recray on the Ray cluster, serve the model if it passes its checks.

A service asks `recray.load("<bucket>/runs/daily")`, which is what was promoted; `recray rollback` returns to the one before.

Variables: recray_bucket (s3://bucket), recray_address (http://HEAD:8265). Connection: aws_default. The workers of Airflow
need apache-airflow-providers-amazon, recray[cluster] with torch (the checks run there), the token in RAY_AUTH_TOKEN, and the configuration at <bucket>/config/my.toml.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.providers.amazon.aws.sensors.s3 import S3KeySensor
from airflow.sdk import DAG, task

_BUCKET, _DAY = "{{ var.value.recray_bucket }}", "{{ ds }}"
_CONFIG = f"{_BUCKET}/config/my.toml"
_RUN = f"--set run.name=daily --set run.output={_BUCKET}/runs"

with DAG(
    dag_id="recray_daily",
    schedule="0 3 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=10)},
) as dag:
    features = S3KeySensor(
        task_id="features",
        bucket_key=f"{_BUCKET}/clicks/day={_DAY}/_SUCCESS",
        mode="reschedule",
        timeout=timedelta(hours=6).total_seconds(),
    )

    # A retry resumes from the last epoch: the run keeps its name, and every night adds its artefacts to it.
    @task.bash(env={"RAY_AUTH_MODE": "token"}, append_env=True)
    def train() -> str:
        return (
            f"recray submit {_CONFIG} --address {{{{ var.value.recray_address }}}} {_RUN} "
            f"--report {_BUCKET}/reports/{_DAY}.json"
        )

    # Exit code 1: the night's model is held back, and the one before stays served. The task fails, so that someone looks.
    @task.bash(retries=0)
    def promote() -> str:
        return f"recray promote {_CONFIG} {_RUN}"

    features >> train() >> promote()
