package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// The chain is run here and not by libcni's AddNetworkList and DelNetworkList:
// those stop a DEL at the first plugin that fails, and write their cache after
// the last ADD only, so that a crash in between leaves nothing to undo by.

// config is what one plugin reads.
func (r *record) config(p *libcni.PluginConfig, prev types.Result) ([]byte, error) {
	in := map[string]any{"name": r.Network, "cniVersion": r.CNIVersion}
	if prev != nil {
		in["prevResult"] = prev
	}
	rc := map[string]json.RawMessage{}
	for c, on := range p.Network.Capabilities {
		if v, ok := r.Capabilities[c]; ok && on {
			rc[c] = v
		}
	}
	if len(rc) > 0 {
		in["runtimeConfig"] = rc
	}
	out, err := libcni.InjectConf(p, in)
	if err != nil {
		return nil, err
	}
	return out.Bytes, nil
}

func (s *Service) env(command string, r *record, netns string) []string {
	return (&invoke.Args{
		Command: command, ContainerID: r.ContainerID, NetNS: netns, PluginArgs: r.Args, IfName: r.IfName,
		Path: strings.Join(s.cfg.BinDirs, ":"),
	}).AsEnv()
}

// call runs one plugin within a time limit.
func (s *Service) call(ctx context.Context, limit time.Duration, plugin string, stdin []byte, env []string) ([]byte, error) {
	path, err := s.exec.FindInPath(plugin, s.cfg.BinDirs)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return s.exec.ExecPlugin(ctx, path, stdin, env)
}

// leased gives the plugins what tells a later engine that they run.
func (s *Service) leased(ctx context.Context, r *record, fn func(ctx context.Context) error) error {
	wait, cancel := context.WithTimeout(ctx, s.cfg.Limits.Grace)
	f, err := s.disk.lease(wait, r)
	cancel()
	if err != nil {
		return err
	}
	defer f.Close()
	return fn(withLease(ctx, f))
}

// add runs ADD along the chain.
func (s *Service) add(ctx context.Context, l *list, r *record) (res Result, err error) {
	err = s.leased(ctx, r, func(ctx context.Context) error {
		var prev types.Result
		for _, p := range l.Plugins {
			conf, err := r.config(p, prev)
			if err != nil {
				return fmt.Errorf("plugin %s: %w", p.Network.Type, err)
			}
			out, err := s.call(ctx, s.cfg.Limits.Add, p.Network.Type, conf, s.env("ADD", r, r.NetNS))
			if err != nil {
				return fmt.Errorf("plugin %s: %w", p.Network.Type, err)
			}
			if prev, err = decodeTyped(out, r.CNIVersion); err != nil {
				return fmt.Errorf("plugin %s: %w", p.Network.Type, err)
			}
		}
		raw, err := json.Marshal(prev)
		if err != nil {
			return err
		}
		if res, err = fromTyped(prev, raw); err != nil {
			return fmt.Errorf("plugin %s: %w", l.Plugins[len(l.Plugins)-1].Network.Type, err)
		}
		res.Network = l.Name
		return nil
	})
	return res, err
}

// undo runs DEL along the chain, backwards, and drops the record. Every plugin
// gets its turn whatever the others do; one whose program is gone can undo
// nothing and is passed over.
func (s *Service) undo(ctx context.Context, r *record) error {
	gate := s.gate(r.Network)
	if err := gate.Acquire(ctx, 1); err != nil {
		return err
	}
	defer gate.Release(1)
	return s.undoGated(ctx, r)
}

func (s *Service) undoGated(ctx context.Context, r *record) error {
	now := time.Now()
	if r.since.IsZero() {
		r.since = now
	}
	err := s.leased(ctx, r, func(ctx context.Context) error { return s.chainDel(ctx, r) })
	if err == nil {
		return s.forget(r)
	}
	if now.Sub(r.since) >= s.cfg.Limits.GiveUp {
		s.log.Error("the teardown of a CNI attachment is given up: what its plugins hold stays with them",
			"container", r.ContainerID, "interface", r.IfName, "network", r.Network, "attempts", r.tries+1, "cause", err)
		return s.forget(r)
	}
	pause := min(s.cfg.Limits.RetryFirst<<min(r.tries, 16), s.cfg.Limits.RetryLast)
	r.State, r.tries, r.next = removing, r.tries+1, now.Add(pause)
	s.put(key{r.ContainerID, r.IfName}, r)
	s.wake()
	return fmt.Errorf("cannot disconnect %s from CNI network %s: %w", r.ContainerID, r.Network, err)
}

func (s *Service) chainDel(ctx context.Context, r *record) error {
	plugins, err := r.plugins()
	if err != nil {
		return err
	}
	var prev types.Result
	// DEL is given the result since 0.4.0.
	if ok, _ := version.GreaterThanOrEqualTo(r.CNIVersion, "0.4.0"); ok && len(r.Result) > 0 {
		if prev, err = decodeTyped(r.Result, r.CNIVersion); err != nil {
			s.log.Warn("the cached result of a CNI attachment cannot be read; its plugins must do without", "container", r.ContainerID, "cause", err)
			prev = nil
		}
	}
	netns := r.netns()
	var errs error
	for i := len(plugins) - 1; i >= 0; i-- {
		name := plugins[i].Network.Type
		conf, err := r.config(plugins[i], prev)
		if err == nil {
			_, err = s.call(ctx, s.cfg.Limits.Del, name, conf, s.env("DEL", r, netns))
		}
		switch {
		case err == nil:
		case isMissing(err):
			s.log.Warn("a CNI plugin is gone and cannot undo what it did", "plugin", name, "container", r.ContainerID, "network", r.Network)
		case fault.Is(err, fault.NotFound):
			// It does not know the container: nothing to undo.
		default:
			errs = errors.Join(errs, fmt.Errorf("plugin %s: %w", name, err))
		}
	}
	return errs
}

// isMissing tells a plugin that is not installed from one that has failed.
func isMissing(err error) bool {
	var pe *pluginError
	return fault.Is(err, fault.NotFound) && !errors.As(err, &pe)
}

// check runs CHECK along the chain.
func (s *Service) check(ctx context.Context, r *record) error {
	if ok, _ := version.GreaterThanOrEqualTo(r.CNIVersion, "0.4.0"); !ok || r.DisableCheck {
		return nil
	}
	plugins, err := r.plugins()
	if err != nil {
		return err
	}
	prev, err := decodeTyped(r.Result, r.CNIVersion)
	if err != nil {
		return fmt.Errorf("cannot check CNI network %s: %w", r.Network, err)
	}
	for _, p := range plugins {
		conf, err := r.config(p, prev)
		if err == nil {
			_, err = s.call(ctx, s.cfg.Limits.Ask, p.Network.Type, conf, s.env("CHECK", r, r.NetNS))
		}
		if err != nil {
			return fmt.Errorf("CNI network %s is not as it was made: plugin %s: %w", r.Network, p.Network.Type, err)
		}
	}
	return nil
}
