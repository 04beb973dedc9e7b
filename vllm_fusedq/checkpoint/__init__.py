"""What a checkpoint's files say: configuration and safetensors headers, local or on the hub."""
