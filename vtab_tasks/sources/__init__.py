"""Three ways to the same items: community folders, data prepared by TFDS, drawings."""
