"""Makes buckets in the object store where they are missing: `python -m infra.bucket NAME ...`.

The store is that of AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
"""

import sys


def main() -> None:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client("s3", region_name="us-east-1")
    try:
        known = {item["Name"] for item in client.list_buckets()["Buckets"]}
        for name in sorted(set(sys.argv[1:]) - known):
            client.create_bucket(Bucket=name)
    except (BotoCoreError, ClientError) as error:
        raise SystemExit(f"bucket: {client.meta.endpoint_url}: {error}") from None


if __name__ == "__main__":
    main()
