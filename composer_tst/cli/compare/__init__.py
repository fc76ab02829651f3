"""What ``composer-tst compare`` is made of: runs read from TensorBoard files, compared and drawn."""
