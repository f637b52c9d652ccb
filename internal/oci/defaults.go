package oci

import (
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
)

// Defaults are the engine's answers to what a request leaves open.
type Defaults struct {
	ShmSize      int64 // bytes, 0 is DefaultShmSize
	IpcMode      container.IpcMode
	CgroupnsMode container.CgroupnsMode
	Runtime      string
	Ulimits      map[string]*container.Ulimit
}

// ApplyDefaults fills in what a host configuration leaves open, as inspect shows
// it: an own IPC and cgroup namespace, twice the memory limit as memory with
// swap, the size of /dev/shm, masked paths.
func ApplyDefaults(hc *container.HostConfig, h Host, d Defaults) {
	if hc.NetworkMode == "" {
		hc.NetworkMode = network.NetworkDefault
	}
	if hc.Memory > 0 && hc.MemorySwap == 0 {
		hc.MemorySwap = hc.Memory * 2
	}
	// Minus one is how clients spell "leave it".
	if hc.MemorySwappiness != nil && *hc.MemorySwappiness == -1 {
		hc.MemorySwappiness = nil
	}
	if hc.ShmSize == 0 {
		if hc.ShmSize = d.ShmSize; hc.ShmSize == 0 {
			hc.ShmSize = DefaultShmSize
		}
	}
	if hc.IpcMode == "" {
		if hc.IpcMode = d.IpcMode; hc.IpcMode == "" {
			hc.IpcMode = container.IPCModePrivate
		}
	}
	if hc.CgroupnsMode == "" {
		if hc.CgroupnsMode = d.CgroupnsMode; hc.CgroupnsMode == "" {
			hc.CgroupnsMode = container.CgroupnsModePrivate
		}
	}
	if hc.Runtime == "" {
		hc.Runtime = d.Runtime
	}
	if hc.RestartPolicy.Name == "" {
		hc.RestartPolicy.Name = container.RestartPolicyDisabled
	}
	for name, u := range d.Ulimits {
		own := false
		for _, have := range hc.Ulimits {
			own = own || have != nil && have.Name == name
		}
		if !own {
			c := *u
			hc.Ulimits = append(hc.Ulimits, &c)
		}
	}
	o, err := ParseSecurityOpt(hc.SecurityOpt)
	if err == nil && !hc.Privileged && !o.SystemPaths {
		if hc.MaskedPaths == nil {
			hc.MaskedPaths = MaskedPaths(h)
		}
		if hc.ReadonlyPaths == nil {
			hc.ReadonlyPaths = ReadonlyPaths()
		}
	}
}
