package oci

import (
	"maps"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image"
)

// Merge completes cfg by what the image sets, as Docker does: what the request
// says wins; maps are joined; an entrypoint in the request drops the image's
// command; a variable of the image is added unless the request names it. Nothing
// in img is shared with or changed through cfg afterwards.
func Merge(cfg *container.Config, img image.Resolved) error {
	ic := img.Config
	if cfg.User == "" {
		cfg.User = ic.User
	}
	for p := range ic.ExposedPorts {
		port, err := network.ParsePort(p)
		if err != nil {
			return fault.New(fault.Invalid, "cannot use image %s: exposed port %q: %w", img.Ref, p, err)
		}
		if cfg.ExposedPorts == nil {
			cfg.ExposedPorts = network.PortSet{}
		}
		cfg.ExposedPorts[port] = struct{}{}
	}
	named := make(map[string]bool, len(cfg.Env))
	for _, e := range cfg.Env {
		k, _, _ := strings.Cut(e, "=")
		named[k] = true
	}
	if len(cfg.Env) == 0 {
		cfg.Env = slices.Clone(ic.Env)
	} else {
		for _, e := range ic.Env {
			if k, _, _ := strings.Cut(e, "="); !named[k] {
				cfg.Env = append(cfg.Env, e)
			}
		}
	}
	cfg.Labels = join(ic.Labels, cfg.Labels)

	if len(cfg.Entrypoint) == 0 {
		if len(cfg.Cmd) == 0 {
			cfg.Cmd = slices.Clone(ic.Cmd)
		}
		if cfg.Entrypoint == nil {
			cfg.Entrypoint = slices.Clone(ic.Entrypoint)
		}
	}
	// docker run --entrypoint="" sends [""], which takes the image's away.
	if len(cfg.Entrypoint) == 1 && cfg.Entrypoint[0] == "" {
		cfg.Entrypoint = nil
	}
	if len(cfg.Entrypoint) == 0 && len(cfg.Cmd) == 0 {
		return fault.New(fault.Invalid, "no command specified")
	}

	if h := img.Healthcheck; h != nil {
		mergeHealth(cfg, h)
	}
	if cfg.WorkingDir == "" {
		cfg.WorkingDir = ic.WorkingDir
	}
	// Old images name directories without the slash; the root is meant.
	if cfg.WorkingDir != "" && !strings.HasPrefix(cfg.WorkingDir, "/") && cfg.WorkingDir == ic.WorkingDir {
		cfg.WorkingDir = "/" + cfg.WorkingDir
	}
	for v := range ic.Volumes {
		if cfg.Volumes == nil {
			cfg.Volumes = map[string]struct{}{}
		}
		cfg.Volumes[v] = struct{}{}
	}
	if cfg.StopSignal == "" {
		cfg.StopSignal = ic.StopSignal
	}
	if len(cfg.Shell) == 0 {
		cfg.Shell = slices.Clone(img.Shell)
	}
	return nil
}

func join(under, over map[string]string) map[string]string {
	out := make(map[string]string, len(under)+len(over))
	maps.Copy(out, under)
	maps.Copy(out, over)
	return out
}

// mergeHealth takes the image's check where the request has none, and fills in
// what the request's leaves out.
func mergeHealth(cfg *container.Config, h *image.Healthcheck) {
	if cfg.Healthcheck == nil {
		cfg.Healthcheck = &container.HealthConfig{}
	}
	c := *cfg.Healthcheck
	if len(c.Test) == 0 {
		c.Test = slices.Clone(h.Test)
	}
	if c.Interval == 0 {
		c.Interval = h.Interval
	}
	if c.Timeout == 0 {
		c.Timeout = h.Timeout
	}
	if c.StartPeriod == 0 {
		c.StartPeriod = h.StartPeriod
	}
	if c.StartInterval == 0 {
		c.StartInterval = h.StartInterval
	}
	if c.Retries == 0 {
		c.Retries = h.Retries
	}
	cfg.Healthcheck = &c
}
