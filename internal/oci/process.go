package oci

import (
	"math"
	"slices"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func (g *generator) process() error {
	cfg, hc := g.in.Config, g.in.HostConfig
	args, err := Args(cfg)
	if err != nil {
		return err
	}
	caps, err := Capabilities(hc, g.in.Host)
	if err != nil {
		return err
	}
	rlimits, err := Rlimits(hc.Ulimits)
	if err != nil {
		return err
	}
	p := &specs.Process{
		Terminal:        cfg.Tty,
		User:            cloneUser(g.in.User),
		Args:            args,
		Env:             Environment(cfg, cfg.Tty, g.in.LinkEnv, nil, g.in.Home),
		Cwd:             cfg.WorkingDir,
		Capabilities:    capabilitySets(caps, g.in.User.UID),
		Rlimits:         rlimits,
		NoNewPrivileges: g.in.NoNewPrivileges,
		SelinuxLabel:    g.in.ProcessLabel,
	}
	if p.Cwd == "" {
		p.Cwd = "/"
	}
	if hc.Umask != nil {
		m := *hc.Umask
		p.User.Umask = &m
	}
	if cfg.Tty && hc.ConsoleSize != [2]uint{} {
		p.ConsoleSize = &specs.Box{Height: hc.ConsoleSize[0], Width: hc.ConsoleSize[1]}
	}
	if g.opts.NoNewPrivileges != nil {
		p.NoNewPrivileges = *g.opts.NoNewPrivileges
	}
	p.ApparmorProfile, err = appArmor(g.opts, hc.Privileged, g.in.Host, g.in.AppArmorProfile)
	if err != nil {
		return err
	}
	// An unprivileged engine may not lower the score it runs with, so 0 means inherit.
	if !g.in.Rootless || hc.OomScoreAdj > 0 {
		score := hc.OomScoreAdj
		p.OOMScoreAdj = &score
	} else if hc.OomScoreAdj < 0 {
		g.warn("a rootless engine cannot lower the OOM score. OomScoreAdj discarded.")
	}
	g.spec.Linux.MountLabel = g.in.MountLabel
	g.spec.Process = p
	return nil
}

// Args is the command line of a merged configuration.
func Args(cfg *container.Config) ([]string, error) {
	entry := cfg.Entrypoint
	if len(entry) == 1 && entry[0] == "" {
		entry = nil
	}
	args := make([]string, 0, len(entry)+len(cfg.Cmd))
	args = append(append(args, entry...), cfg.Cmd...)
	if len(args) == 0 {
		return nil, fault.New(fault.Invalid, "no command specified")
	}
	return args, nil
}

// Environment makes a process's variables: PATH, HOSTNAME, TERM with a terminal,
// links, then the configuration's and extra, later ones replacing earlier. A name
// without "=" removes the variable. HOME comes last, unless set.
func Environment(cfg *container.Config, tty bool, links, extra []string, home string) []string {
	env := make([]string, 0, 4+len(links)+len(cfg.Env)+len(extra))
	env = append(env, "PATH="+DefaultPath)
	if cfg.Hostname != "" {
		env = append(env, "HOSTNAME="+cfg.Hostname)
	}
	if tty {
		env = append(env, "TERM=xterm")
	}
	env = append(env, links...)
	env = override(env, cfg.Env)
	env = override(env, extra)
	if home == "" {
		home = "/"
	}
	if at := indexOf(env, "HOME"); at < 0 {
		env = append(env, "HOME="+home)
	} else if env[at] == "HOME=" {
		env[at] = "HOME=" + home
	}
	return env
}

func override(env, with []string) []string {
	for _, v := range with {
		name, _, ok := strings.Cut(v, "=")
		at := indexOf(env, name)
		switch {
		case !ok && at >= 0:
			env = slices.Delete(env, at, at+1)
		case !ok:
		case at >= 0:
			env[at] = v
		default:
			env = append(env, v)
		}
	}
	return env
}

func indexOf(env []string, name string) int {
	for i, e := range env {
		if len(e) > len(name) && e[len(name)] == '=' && e[:len(name)] == name {
			return i
		}
	}
	return -1
}

// rlimitNames are the limits that setrlimit knows.
var rlimitNames = []string{
	"as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice",
	"nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack",
}

// Rlimits converts ulimits; -1 is unlimited.
func Rlimits(ulimits []*units.Ulimit) ([]specs.POSIXRlimit, error) {
	var out []specs.POSIXRlimit
	for _, u := range ulimits {
		if u == nil {
			continue
		}
		name := strings.ToLower(u.Name)
		if !slices.Contains(rlimitNames, name) {
			return nil, fault.New(fault.Invalid, "invalid ulimit type: %s", u.Name)
		}
		l := specs.POSIXRlimit{Type: "RLIMIT_" + strings.ToUpper(name), Soft: limit(u.Soft), Hard: limit(u.Hard)}
		if l.Soft > l.Hard {
			return nil, fault.New(fault.Invalid, "ulimit soft limit must be less than or equal to hard limit: %d > %d", u.Soft, u.Hard)
		}
		if i := slices.IndexFunc(out, func(o specs.POSIXRlimit) bool { return o.Type == l.Type }); i >= 0 {
			out[i] = l
			continue
		}
		out = append(out, l)
	}
	return out, nil
}

func limit(v int64) uint64 {
	if v < 0 {
		return math.MaxUint64
	}
	return uint64(v)
}

func cloneUser(u specs.User) specs.User {
	u.AdditionalGids = slices.Clone(u.AdditionalGids)
	return u
}

// InitWanted tells whether the built-in reaper should be pid 1: asked for (or
// the default), and the pid namespace is the container's own.
func InitWanted(hc *container.HostConfig, byDefault bool) bool {
	if hc.Init != nil {
		byDefault = *hc.Init
	}
	return byDefault && hc.PidMode.IsPrivate()
}
