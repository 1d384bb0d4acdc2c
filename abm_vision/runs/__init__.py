"""What every harness is made of, for images or text: settings, flags, result folders, devices, initialisation."""
