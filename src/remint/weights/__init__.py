"""Files of tensors: shards, adapters, InternLM2's layout. A change reruns the stages that read or write such files."""
