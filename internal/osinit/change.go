package osinit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/api/system"
	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osinit/upgrade"
	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/slots"
)

const (
	// changeFile keeps the last upgrade or rollback.
	changeFile = "/var/lib/cloudos/change.json"
	// keysDir has the public keys that the image trusts.
	keysDir     = "/etc/cloudos/keys"
	versionFile = "/etc/cloudos/version"
	// healthLimit is how long a new system has to come up well; healthyFor is how
	// long it must then stay so.
	healthLimit = 5 * time.Minute
	healthyFor  = 5 * time.Second
	maxRestarts = 3
)

// changes upgrades the system and goes back to the earlier one.
type changes struct {
	m    *machine
	boot *upgrade.Boot

	mu   sync.Mutex // held for a moment, never while something is written
	busy string
}

func newChanges(m *machine) *changes {
	return &changes{m: m, boot: &upgrade.Boot{Find: m.bootPartition, Prepare: func() error {
		return m.modules.LoadAll("vfat", "nls_cp437", "nls_iso8859_1", "nls_ascii", "nls_utf8")
	}}}
}

// begin reserves the slots for one change at a time.
func (c *changes) begin(what string) (end func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.busy != "" {
		return nil, fault.New(fault.Conflict, "cannot %s: another change of the system is under way (%s)", what, c.busy)
	}
	c.busy = what
	return func() {
		c.mu.Lock()
		c.busy = ""
		c.mu.Unlock()
	}, nil
}

// running is the slot that this system runs from.
func (c *changes) running() (string, error) {
	s := c.m.cmdline["slot"]
	if s != "a" && s != "b" {
		return "", fault.New(fault.Unsupported, "this machine does not run from a disk with slots (it is a virtual machine of VM mode, or runs from a medium): install it first")
	}
	return s, nil
}

func runningVersion() string { return strings.TrimSpace(readText(versionFile)) }

func readText(p string) string {
	b, err := os.ReadFile(p)
	if err != nil {
		return ""
	}
	return string(b)
}

// slotDevice is the partition of a slot, on the disk that the running one is on.
func (c *changes) slotDevice(slot string) (string, error) {
	d, err := c.m.startDisk(slots.Partition(c.m.cmdline["slot"]))
	if err != nil {
		return "", err
	}
	dev, err := d.Partition(slots.Partition(slot))
	return dev.Path, err
}

// options of an upgrade.
type options struct {
	allowUnsigned, allowDowngrade bool
}

// upgrade writes an archive into the slot that does not run and has it start next.
func (c *changes) upgrade(ctx context.Context, r io.Reader, o options, progress func(step, part string, n, total int64)) (*system.Change, error) {
	running, err := c.running()
	if err != nil {
		return nil, err
	}
	end, err := c.begin("upgrade")
	if err != nil {
		return nil, err
	}
	defer end()
	archive, err := release.ReadArchive(r)
	if err != nil {
		return nil, err
	}
	manifest, err := c.judge(archive.Envelope(), o)
	if err != nil {
		return nil, err
	}
	if err := c.confirmed(running); err != nil {
		return nil, err
	}
	slot := slots.Other(running)
	root, err := c.slotDevice(slot)
	if err != nil {
		return nil, err
	}
	change := &system.Change{Kind: "upgrade", From: runningVersion(), To: manifest.Version, Slot: slot, Outcome: system.Pending, Begun: time.Now().UTC(), Network: c.m.hasAddress()}
	// The slot is not to be tried while it is written.
	if err := c.alone(ctx, running); err != nil {
		return nil, err
	}
	if c.owners() {
		if err := errors.Join(c.anotherRoot(manifest, running), c.prepareUnified(running)); err != nil {
			return nil, err
		}
	}
	c.m.log.Printf("writing system %s to slot %s", manifest.Version, slot)
	t := upgrade.Target{Boot: c.boot, Slot: slot, Root: root, Progress: progress}
	if err := t.Write(ctx, manifest, archive.Envelope(), archive); err != nil {
		return nil, fmt.Errorf("cannot upgrade to %s: %w", manifest.Version, err)
	}
	return change, c.start(change)
}

// confirmed refuses changes while the running system is tried itself: the other slot has
// the only one that is known to be good.
func (c *changes) confirmed(running string) error {
	return c.boot.With(false, func(dir string) error {
		s, err := upgrade.State(dir)
		if err == nil && s.Good != running {
			err = fault.New(fault.Conflict, "cannot change the system now: the one that runs (slot %s) has not yet come up well itself, and slot %s has the last good one", running, s.Good)
		}
		return err
	})
}

// judge decides whether a release may be written.
func (c *changes) judge(sealed []byte, o options) (*release.Manifest, error) {
	trusted, err := release.KeysIn(keysDir)
	if err != nil {
		return nil, err
	}
	m, _, err := release.Signed(sealed, trusted)
	if fault.Of(err) == fault.Forbidden && o.allowUnsigned {
		if m, _, err = release.Open(sealed, nil); err == nil {
			c.m.log.Printf("the release %s is not signed by a key that is trusted: it is written because that was asked for", m.Version)
		}
	}
	if err != nil {
		return nil, err
	}
	return m, c.suits(m, o.allowDowngrade)
}

// suits tells whether a release is one for this machine.
func (c *changes) suits(m *release.Manifest, allowDowngrade bool) error {
	s := c.m.Status()
	if m.Arch != s.Arch {
		return fault.New(fault.Invalid, "cannot use the release %s: it is for %s, and this machine is %s", m.Version, m.Arch, s.Arch)
	}
	if err := c.startsAs(m); err != nil {
		return err
	}
	if m.Platform == release.Cloud && platform() == release.Metal {
		return fault.New(fault.Invalid, "cannot use the release %s: it has the drivers of virtual machines alone, and this system those of real ones", m.Version)
	}
	if allowDowngrade {
		return nil
	}
	now := runningVersion()
	switch older, known := release.Older(m.Version, now); {
	case !known:
		return fault.New(fault.Conflict, "cannot use the release %s: whether it is older than %s, which runs, cannot be told (allow it with --downgrade)", m.Version, now)
	case older:
		return fault.New(fault.Conflict, "cannot use the release %s: it is older than %s, which runs (allow it with --downgrade)", m.Version, now)
	}
	return nil
}

// platform is that of the running system, as its image says.
func platform() string { return strings.TrimSpace(readText("/etc/cloudos/platform")) }

// hasAddress tells whether a link has an address that others reach beyond the link.
func (m *machine) hasAddress() bool {
	for _, l := range m.Status().Interfaces {
		for _, a := range l.Addresses {
			if p, err := netip.ParsePrefix(a); err == nil && !p.Addr().IsLinkLocalUnicast() {
				return true
			}
		}
	}
	return false
}

// next changes what starts next.
func (c *changes) next(change func(slots.State) slots.State) error {
	return c.boot.With(true, func(dir string) error {
		s, err := upgrade.State(dir)
		if err != nil {
			return err
		}
		if to := change(s); to != s {
			return upgrade.SetState(dir, to)
		}
		return nil
	})
}

// alone has the running slot start, and no other tried. That may be another start than this one was: after a system that
// did not come up the boot loader takes another way to the good one.
func (c *changes) alone(ctx context.Context, running string) error {
	var now slots.State
	if err := c.boot.With(false, func(dir string) (err error) { now, err = upgrade.State(dir); return err }); err != nil {
		return err
	}
	if now == (slots.State{Good: running}) {
		return nil
	}
	if !c.owners() { // the firmware has one way to each
		if err := c.announce(ctx, running, ""); err != nil {
			return err
		}
	}
	return c.next(func(slots.State) slots.State { return slots.State{Good: running} })
}

// start notes a change, and then has the boot loader try its slot.
func (c *changes) start(change *system.Change) error {
	if err := keep(change); err != nil {
		return err
	}
	running, err := c.running()
	if err != nil {
		return err
	}
	if err := c.announce(context.Background(), running, change.Slot); err != nil {
		return err
	}
	try := slots.State{Good: running}.Start(change.Slot)
	if c.owners() {
		try = slots.State{Good: running}.StartOnce(change.Slot)
	}
	if err := c.next(func(slots.State) slots.State { return try }); err != nil {
		return err
	}
	if c.owners() {
		if err := c.tryUnified(running); err != nil {
			return errors.Join(err, c.next(func(slots.State) slots.State { return slots.State{Good: running} }))
		}
	}
	c.m.log.Printf("system %s in slot %s starts next", change.To, change.Slot)
	return nil
}

// keep writes what is known of a change.
func keep(change *system.Change) error {
	b, err := json.Marshal(change)
	if err != nil {
		return err
	}
	return durable.WriteFile(changeFile, append(b, '\n'), 0o600, durable.Everything)
}

// last reads it.
func last() *system.Change {
	c := new(system.Change)
	if b, err := os.ReadFile(changeFile); err != nil || json.Unmarshal(b, c) != nil {
		return nil
	}
	return c
}

// rollback has the other slot's system start, if it is whole.
func (c *changes) rollback(ctx context.Context, force bool) (*system.Change, error) {
	running, err := c.running()
	if err != nil {
		return nil, err
	}
	end, err := c.begin("go back")
	if err != nil {
		return nil, err
	}
	defer end()
	slot := slots.Other(running)
	root, err := c.slotDevice(slot)
	if err != nil {
		return nil, err
	}
	if err := c.confirmed(running); err != nil {
		return nil, err
	}
	var sealed []byte
	var state slots.State
	err = c.boot.With(false, func(dir string) (err error) {
		if state, err = upgrade.State(dir); err == nil {
			sealed, err = upgrade.Sealed(dir, slot)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if sealed == nil {
		return nil, fault.New(fault.NotFound, "cannot go back: there is no whole system in slot %s", slot)
	}
	m, _, err := release.Open(sealed, nil) // it was written by an upgrade, or with the disk
	if err != nil {
		return nil, err
	}
	if state.Fallen() && state.Try == slot && !force {
		return nil, fault.New(fault.Conflict, "cannot go to system %s in slot %s: it did not come up when it was tried (try again with --force)", m.Version, slot)
	}
	if err := c.boot.Check(ctx, slot, root, m); err != nil {
		return nil, fmt.Errorf("cannot go back: %w", err)
	}
	change := &system.Change{Kind: "rollback", From: runningVersion(), To: m.Version, Slot: slot, Outcome: system.Pending, Begun: time.Now().UTC(), Network: c.m.hasAddress()}
	return change, c.start(change)
}

// status tells everything about slots and changes.
func (c *changes) status() system.Status {
	s := c.m.Status()
	out := system.Status{Version: runningVersion(), Arch: s.Arch, Platform: platform(), Kernel: s.Kernel, Hostname: s.Hostname, State: s.State, Problems: s.Problems, Last: last(), RecoveryKey: s.Trust.RecoveryKey}
	c.mu.Lock()
	out.Busy = c.busy
	c.mu.Unlock()
	trusted, err := release.KeysIn(keysDir)
	if err != nil {
		out.Problems = append(out.Problems, err.Error())
	}
	for _, k := range trusted {
		out.Keys = append(out.Keys, k.ID())
	}
	running, err := c.running()
	if err != nil || out.Busy != "" {
		return out // the boot partition is in use while a system is written
	}
	err = c.boot.With(false, func(dir string) error {
		state, err := upgrade.State(dir)
		if err != nil {
			return err
		}
		out.Next = state.Next()
		for _, name := range []string{"a", "b"} {
			slot := system.Slot{Name: name, Running: name == running, Good: name == state.Good}
			if state.Try == name {
				slot.TriesLeft, slot.Failed = state.Left, state.Left == 0 && name != running
			}
			if sealed, err := upgrade.Sealed(dir, name); err == nil && sealed != nil {
				if m, signer, err := release.Open(sealed, trusted); err == nil {
					slot.Version, slot.SignedBy = m.Version, signer
				}
			}
			out.Slots = append(out.Slots, slot)
		}
		return nil
	})
	if err != nil {
		out.Problems = append(out.Problems, err.Error())
	}
	return out
}
