"""Three sources of the same items: community folders, data prepared by TFDS, rendered images."""
