"""Every day: wait for the feature pipeline's Parquet, run recray on the Ray cluster, publish the index.

Variables: recray_bucket (s3://bucket), recray_address (http://HEAD:8265). Connection: aws_default. The workers of Airflow
need apache-airflow-providers-amazon, recray[cluster], the token in RAY_AUTH_TOKEN, and the configuration at <bucket>/config/my.toml.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.providers.amazon.aws.sensors.s3 import S3KeySensor
from airflow.sdk import DAG, task

_BUCKET, _DAY = "{{ var.value.recray_bucket }}", "{{ ds }}"

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

    # A retry goes on from the last epoch: the run keeps its name.
    @task.bash(env={"RAY_AUTH_MODE": "token"}, append_env=True)
    def train() -> str:
        return (
            f"recray submit {_BUCKET}/config/my.toml --address {{{{ var.value.recray_address }}}} "
            f"--set run.name=daily-{_DAY} --set run.output={_BUCKET}/runs "
            f"--report {_BUCKET}/runs/daily-{_DAY}/report.json"
        )

    @task
    def publish(bucket: str, day: str) -> str:
        """Name the day's index as the current one, in one small file that a service reads."""
        from recray import storage
        from recray.records import IndexRecord

        folder = f"{bucket}/runs/daily-{day}/index"
        record = IndexRecord.read(folder)
        if record.recall < record.recall_target:
            raise ValueError(
                f"{record.id} reaches recall {record.recall:.4f}, below {record.recall_target}: not published"
            )
        storage.write_json(f"{bucket}/current.json", {"index": folder, "id": record.id})
        return folder

    features >> train() >> publish(_BUCKET, _DAY)
