"""What the pipeline runs on: local servers, a Prefect server's set-up, the doctor, images and clusters."""
