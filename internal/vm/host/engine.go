package host

import (
	"bufio"
	"context"
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"

	"github.com/cloudos-io/cloudos/api"
)

// watchEngine follows the engine in the guest until ctx ends: how many
// containers run, what they publish, which shared folders they mount.
func (h *Host) watchEngine(ctx context.Context, l *live) {
	go l.changes.run(ctx)
	for ctx.Err() == nil {
		h.follow(ctx, l)
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// follow looks at all containers after each event that could change something,
// and every ten seconds.
func (h *Host) follow(ctx context.Context, l *live) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	_, engine, _ := l.conversation()
	resp, err := open(ctx, engine, "GET", `/events?filters={"type":["container","network"]}`, nil)
	if err != nil {
		return
	}
	defer resp.Body.Close()
	poke := make(chan struct{}, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		lines := bufio.NewScanner(resp.Body)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var m events.Message
			if json.Unmarshal(lines.Bytes(), &m) != nil || !matters(m.Action) {
				continue
			}
			select {
			case poke <- struct{}{}:
			default:
			}
		}
	}()
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for {
		if err := h.look(ctx, l); err != nil && ctx.Err() == nil {
			h.log.Warn("cannot list the machine's containers", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ended:
			return
		case <-poke:
			h.used()
		case <-tick.C:
			h.sleepOver(ctx)
		}
	}
}

// sleepOver waits until the machine is awake: a paused one answers nothing.
func (h *Host) sleepOver(ctx context.Context) {
	for ctx.Err() == nil {
		if state, _ := h.now(); state == api.VMRunning {
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func matters(a events.Action) bool {
	return slices.Contains([]events.Action{events.ActionStart, events.ActionDie, events.ActionRestart, events.ActionDestroy, events.ActionStop,
		events.ActionRename, events.ActionPause, events.ActionUnPause, events.ActionConnect, events.ActionDisconnect}, a)
}

// look lists the containers that run and does what follows from it.
func (h *Host) look(ctx context.Context, l *live) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	var list []container.Summary
	if err := l.engine(ctx, "GET", "/containers/json", nil, &list); err != nil {
		return err
	}
	l.mu.Lock()
	l.containers, l.busy = len(list), true
	l.mu.Unlock()
	if len(list) > 0 {
		h.used()
	}
	l.ports.sync(published(list))
	l.changes.want(mounted(list, l.shares(), l.origin))
	return nil
}

// shares are those that the machine has.
func (l *live) shares() []api.VMShare {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []api.VMShare
	for _, s := range l.spec.Shares {
		out = append(out, s.VMShare)
	}
	return out
}

// published lists where containers want to be reached.
func published(list []container.Summary) map[place]string {
	out := map[place]string{}
	for _, c := range list {
		name := c.ID
		if len(c.Names) > 0 {
			name = strings.TrimPrefix(c.Names[0], "/")
		}
		for _, p := range c.Ports {
			if p.PublicPort == 0 || len(out) >= maxPorts {
				continue
			}
			ip := p.IP.Unmap().WithZone("")
			if !ip.IsValid() {
				ip = netip.IPv4Unspecified()
			}
			out[place{addr: netip.AddrPortFrom(ip, p.PublicPort), proto: strings.ToLower(p.Type)}] = bounded(name)
		}
	}
	return out
}

// mounted lists the folders of this host that containers have and that may change
// behind the guest's back. The guest chooses none: each is inside a share.
func mounted(list []container.Summary, shares []api.VMShare, origin func(string) (string, error)) []string {
	var out []string
	for _, c := range list {
		for _, m := range c.Mounts {
			if m.Type != mount.TypeBind {
				continue
			}
			if source, err := origin(m.Source); err == nil && inShares(shares, source) && !slices.Contains(out, source) {
				out = append(out, source)
			}
		}
	}
	slices.Sort(out)
	return out
}
