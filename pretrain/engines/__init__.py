"""Other engines that can train our models; each needs an optional extra."""
