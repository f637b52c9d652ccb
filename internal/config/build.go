package config

import (
	"path/filepath"

	"github.com/docker/go-units"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Build configures the builder of images.
type Build struct {
	// Program is servin-buildd (default: beside servind, then on the PATH).
	Program string `yaml:"program"`
	// Cache is how much build cache is kept (default 20g, at most a tenth of the
	// disk), and MinFree what is to stay free on the disk (default 5g, at most a
	// twentieth of it): cache goes before that is used up.
	Cache   string `yaml:"cache"`
	MinFree string `yaml:"minFree"`
	// Idle is how long a builder without work stays (default 1m).
	Idle Duration `yaml:"idle"`
	// Runtimes are the OCI runtimes for build steps, the first that is there
	// (default servin-runtime, then runc and crun).
	Runtimes []string `yaml:"runtimes"`
}

func (b *Build) check() error {
	if b.Program != "" && !filepath.IsAbs(b.Program) {
		return fault.New(fault.Invalid, "build.program must be an absolute path, not %q", b.Program)
	}
	for name, v := range map[string]string{"cache": b.Cache, "minFree": b.MinFree} {
		if v == "" {
			continue
		}
		if n, err := units.RAMInBytes(v); err != nil || n <= 0 {
			return fault.New(fault.Invalid, "build.%s must be a size such as 20g, not %q", name, v)
		}
	}
	return nil
}

// Budget is the two sizes for a disk of so many bytes.
func (b *Build) Budget(disk int64) (cache, minFree int64) {
	cache, minFree = min(20<<30, disk/10), min(5<<30, disk/20)
	if n, err := units.RAMInBytes(b.Cache); err == nil && n > 0 {
		cache = n
	}
	if n, err := units.RAMInBytes(b.MinFree); err == nil && n > 0 {
		minFree = n
	}
	return cache, minFree
}
