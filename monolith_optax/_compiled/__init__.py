"""What compiled steps copy and allocate."""
