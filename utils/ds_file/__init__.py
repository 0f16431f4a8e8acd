"""The user's own DeepSpeed configuration, the file of `--deepspeed_config`: read, checked and merged."""
