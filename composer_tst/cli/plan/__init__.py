"""What ``composer-tst plan`` is made of."""
