"""64-bit ids on the host and the rows that they have on the device."""
