"""The strategies and the callback for `lightning.pytorch` and `lightning.fabric`."""

from sloth_lightning._factory import build

_made = build("lightning.pytorch", "lightning.fabric", __name__)
SlothCallback = _made.SlothCallback
SlothDDPStrategy = _made.SlothDDPStrategy
SlothFSDPStrategy = _made.SlothFSDPStrategy
SlothFabricDDPStrategy = _made.SlothFabricDDPStrategy
SlothFabricFSDPStrategy = _made.SlothFabricFSDPStrategy
SlothFabricSingleDeviceStrategy = _made.SlothFabricSingleDeviceStrategy
SlothFabricStrategy = _made.SlothFabricStrategy
SlothSingleDeviceStrategy = _made.SlothSingleDeviceStrategy
SlothStrategy = _made.SlothStrategy
