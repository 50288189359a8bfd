"""What a YAML file means: options, data, rewards, training, stages, evaluation."""
