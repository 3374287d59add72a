"""Between the robot and the network: images, prompt, state and actions. Every convention lives here. No PyTorch."""
