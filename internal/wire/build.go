package wire

import (
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/build"
	"github.com/cloudos-io/cloudos/internal/build/contract"
	"github.com/cloudos-io/cloudos/internal/config"
	"github.com/cloudos-io/cloudos/internal/image"
	"github.com/cloudos-io/cloudos/internal/network"
	"github.com/cloudos-io/cloudos/internal/rootless"
)

// newBuilder makes the keeper of servin-buildd.
func newBuilder(c *config.Config, inside rootless.State, instance, armor string, images *image.Service, networks *network.Manager, rules build.Rules, log *slog.Logger) *build.Builder {
	var disk int64
	var st unix.Statfs_t
	if unix.Statfs(c.Root, &st) == nil {
		disk = int64(st.Blocks) * int64(st.Bsize)
	}
	set := contract.Settings{
		Root: filepath.Join(c.Root, "build"), RunRoot: c.RunRoot, Registries: registries(c), Runtimes: buildRuntimes(c, inside.Active),
		AppArmor: armor, Rootless: inside.Active, Nameservers: c.Network.DNS, Search: c.Network.Search, Options: c.Network.Options, Version: api.Version, Instance: instance,
		Tracing: contract.Tracing{Endpoint: c.Tracing.Endpoint, Headers: c.Tracing.Headers, Ratio: c.Tracing.Ratio},
	}
	if !inside.Active {
		set.CgroupParent = "/servin-build-" + instance
	}
	set.Budget, set.MinFree = c.Build.Budget(disk)
	return build.New(build.Config{
		Program: c.Build.Program, Images: images, Networks: networks, Rules: rules, Settings: set, Idle: time.Duration(c.Build.Idle), Logger: log,
	})
}

// buildRuntimes are the programs that may run build steps. Ours wants a cgroup,
// which an ordinary user has none of where the host has cgroups v1.
func buildRuntimes(c *config.Config, ordinary bool) []string {
	if len(c.Build.Runtimes) > 0 {
		return c.Build.Runtimes
	}
	if ordinary && !cgroupV2() {
		return []string{"runc", "crun"}
	}
	l := []string{"servin-runtime", "runc", "crun"}
	if exe, err := os.Executable(); err == nil {
		l = append([]string{filepath.Join(filepath.Dir(exe), "servin-runtime")}, l...)
	}
	return l
}
