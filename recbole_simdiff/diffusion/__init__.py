"""What the diffusion models share: schedules, the forward process, samplers, denoisers."""
