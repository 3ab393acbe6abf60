"""What steps cost by their compiled programs, also for devices that are not here."""
