#!/bin/sh
# Take out of an environment what no program here reads, a third of its size: tests of packages, Ray's Java, Arrow's network
# protocol and headers, other languages of Jupyter, other services of AWS and Google, symbols.
#   docker/trim.sh ENVIRONMENT
set -eu
cd "$1"/lib/python3*/site-packages
find numpy pandas pyarrow sympy networkx sqlalchemy -type d -name tests -prune -exec rm -r {} +
rm -r ray/jars torch/test
find torch/bin -name 'test_*' -delete
rm -r pyarrow/include pyarrow/libarrow_flight* jedi/third_party/django-stubs
find babel/locale-data -name '*.dat' ! -name 'en*' ! -name root.dat -delete
find googleapiclient/discovery_cache/documents -name '*.json' ! -name 'compute.*' ! -name 'iam.*' ! -name 'cloudresourcemanager.*' \
    ! -name 'tpu.*' -delete
find botocore/data -mindepth 1 -maxdepth 1 -type d ! -name ec2 ! -name iam ! -name s3 ! -name sts ! -name 'sso*' ! -name ssm \
    ! -name cloudwatch -exec rm -r {} +
# Only where it saves much: libraries that auditwheel has changed do not survive it.
strip --strip-unneeded torch/lib/libtorch_*.so ray/_raylet.so ray/core/src/ray/raylet/raylet ray/core/src/ray/gcs/gcs_server
python -c 'import boto3, faiss, googleapiclient.discovery, jupyterlab, optuna, pandas, plotly, pyarrow.dataset, pyarrow.parquet, ray.data, ray.train, ray.tune, torch' > /dev/null
