"""What harnesses of image classification share: settings, images, the model, training, records. Nothing of one task."""
