package osinit

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/gpt"
	"github.com/cloudos-io/cloudos/internal/osinit/efiboot"
	"github.com/cloudos-io/cloudos/internal/osinit/upgrade"
	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/slots"
)

// A disk that its owner signed has no boot loader that would choose: the firmware starts a slot's
// unified image itself. Its boot entries are the choice: the good slot's is first in the order,
// a slot that is tried is BootNext, which the firmware forgets before it starts it. So a system
// that is tried has one start, and whatever becomes of it, the next one is the good system's. The
// file of the removable path (EFI/BOOT/BOOTX64.EFI) is a copy of the good system's image, for firmware
// that has lost its entries, and for a disk that was put into another machine.

// owners tells whether this is such a disk.
func (c *changes) owners() bool { return c.m.chain() == chainOwner }

// withFirmware calls fn with the firmware's variables.
func (c *changes) withFirmware(fn func(v efiboot.Vars) error) error {
	if err := c.m.modules.LoadAll("efivarfs"); err != nil {
		return err
	}
	at, err := efivars()
	if err != nil {
		return err
	}
	defer at.Close()
	return fn(efiboot.Vars{Dir: fmt.Sprintf("/proc/self/fd/%d", at.Fd())})
}

// loader is a slot's image as firmware knows it.
func (c *changes) loader(slot string) (efiboot.Loader, error) {
	fail := func(err error) (efiboot.Loader, error) {
		return efiboot.Loader{}, fmt.Errorf("cannot tell the firmware where slot %s is: %w", slot, err)
	}
	dev, err := c.boot.Partition()
	if err != nil {
		return fail(err)
	}
	dir, err := filepath.EvalSymlinks(filepath.Join("/sys/class/block", filepath.Base(dev)))
	if err != nil {
		return fail(err)
	}
	number, err := strconv.Atoi(strings.TrimSpace(readText(filepath.Join(dir, "partition"))))
	if err != nil {
		return fail(err)
	}
	sectors, err := strconv.ParseUint(strings.TrimSpace(readText(filepath.Join(filepath.Dir(dir), "size"))), 10, 55)
	if err != nil {
		return fail(err)
	}
	f, err := os.Open("/dev/" + filepath.Base(filepath.Dir(dir)))
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	t, err := gpt.Read(f, sectors)
	if err != nil {
		return fail(err)
	}
	if number < 1 || number > len(t.Partitions) {
		return fail(errors.New("the disk's table has no such partition"))
	}
	p := t.Partitions[number-1]
	return efiboot.Loader{
		Name: "CloudOS " + slot, Number: uint32(number), First: p.First, Sectors: p.Last - p.First + 1, ID: p.ID,
		File: `\` + strings.ReplaceAll(slots.Folder(slot), "/", `\`) + `\` + slots.UnifiedFile,
	}, nil
}

// goodAlone has the firmware start the good slot, and never the other by itself: it is about
// to be written, or tried, or did not come up. It returns the entry of the other.
func (c *changes) goodAlone(v efiboot.Vars, good string) (other uint16, err error) {
	first, err := c.loader(good)
	if err != nil {
		return 0, err
	}
	tried, err := c.loader(slots.Other(good))
	if err != nil {
		return 0, err
	}
	n, err := v.Ensure(first)
	if err != nil {
		return 0, err
	}
	if err := v.Prefer([]uint16{n}, nil); err != nil { // before there is another
		return 0, err
	}
	if other, err = v.Ensure(tried); err != nil {
		return 0, err
	}
	if err := v.NotOnce(); err != nil {
		return 0, err
	}
	return other, v.Prefer([]uint16{n}, []uint16{other})
}

// prepareUnified makes sure that the running system starts whatever becomes of the other slot.
func (c *changes) prepareUnified(running string) error {
	if err := c.boot.SetDefault(running, removable()); err != nil {
		return noOwnFile(err)
	}
	return c.withFirmware(func(v efiboot.Vars) error {
		_, err := c.goodAlone(v, running)
		return err
	})
}

// tryUnified has the firmware start the other slot once.
func (c *changes) tryUnified(running string) error {
	return c.withFirmware(func(v efiboot.Vars) error {
		other, err := c.goodAlone(v, running)
		if err != nil {
			return err
		}
		return v.Once(other)
	})
}

// settleUnified makes true what firmware has to know of the running slot, which is the good one: the order, and the
// image of the removable path. What is so already is not written.
func (c *changes) settleUnified(running string, state slots.State) error {
	err := c.orderUnified(running, state)
	if serr := c.boot.SetDefault(running, removable()); !errors.Is(serr, os.ErrNotExist) {
		err = errors.Join(err, serr)
	}
	return err
}

// orderUnified has the firmware start the running slot, and the other where that is broken and the other has a
// whole system that came up well before. Firmware without an entry for the running slot starts the removable path.
func (c *changes) orderUnified(running string, state slots.State) error {
	return c.withFirmware(func(v efiboot.Vars) error {
		good, err := c.loader(running)
		if err != nil {
			return err
		}
		n, known, err := v.Find(good)
		if err != nil || !known {
			return err
		}
		other, err := c.loader(slots.Other(running))
		if err != nil {
			return err
		}
		o, ok, err := v.Find(other)
		if err != nil {
			return err
		}
		var sealed []byte
		if ok && state.Try == "" {
			err = c.boot.With(false, func(dir string) (err error) { sealed, err = upgrade.Sealed(dir, slots.Other(running)); return err })
		}
		switch {
		case err != nil:
			return err
		case sealed != nil:
			return v.Prefer([]uint16{n, o}, nil)
		case ok:
			return v.Prefer([]uint16{n}, []uint16{o})
		}
		return v.Prefer([]uint16{n}, nil)
	})
}

// removable is the path that firmware starts without an entry.
func removable() string {
	if runtime.GOARCH == "arm64" {
		return "EFI/BOOT/BOOTAA64.EFI"
	}
	return "EFI/BOOT/BOOTX64.EFI"
}

// noOwnFile explains a disk of an earlier kind.
func noOwnFile(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return fault.New(fault.Unsupported, "cannot change the system: this disk has no place for a second one beside it; write a new signed image to it")
	}
	return err
}

// startsAs tells whether a release starts as the systems on this disk do, and whether its root can be told from
// the one that runs: in the owner's mode a slot is known by its root.
func (c *changes) startsAs(m *release.Manifest) error {
	unified := m.Part(release.Unified) != nil
	switch {
	case unified && !c.owners():
		return fault.New(fault.Invalid, "cannot use the release %s: it is one image that its owner signed for Secure Boot, and this machine starts with boot loaders", m.Version)
	case !unified && c.owners():
		return fault.New(fault.Invalid, "cannot use the release %s: this disk is signed by its owner for Secure Boot, and the release is not (build it with --secure-boot-key)", m.Version)
	}
	return nil
}

// anotherRoot refuses a root that is the running one's.
func (c *changes) anotherRoot(m *release.Manifest, running string) error {
	return c.boot.With(false, func(dir string) error {
		sealed, err := upgrade.Sealed(dir, running)
		if err != nil || sealed == nil {
			return err
		}
		now, _, err := release.Open(sealed, nil)
		if err == nil && now.Part(release.Root).SHA256 == m.Part(release.Root).SHA256 {
			err = fault.New(fault.Conflict, "cannot use the release %s: its root is the one that runs", m.Version)
		}
		return err
	})
}

// byFirmware makes up for what the firmware did where it chooses: it starts a system that is tried once, and
// the good one then. It returns the state as it is to be understood.
func (c *changes) byFirmware(state slots.State, running string) (slots.State, error) {
	switch {
	case state.Try == running && state.Left > 0, state.Try != "" && state.Try != running && !state.Fallen():
		state = state.GiveUp() // this is its one start, or that was
		return state, c.next(func(slots.State) slots.State { return state })
	}
	return state, nil
}
