"""Post-training quantization: calibration, Hessians, sensitivities, bit allocation, GPTQ."""
