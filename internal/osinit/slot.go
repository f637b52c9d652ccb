package osinit

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/osinit/data"
	"github.com/cloudos-io/cloudos/internal/slots"
)

// confirmSlot tells the boot loader that the system in the running slot came up
// well, once its engine answers. Until then each start counts against it.
func (m *machine) confirmSlot(ctx context.Context) {
	running := m.cmdline["slot"]
	if running == "" {
		return
	}
	select {
	case <-m.ready:
	case <-ctx.Done():
		return
	}
	if err := m.confirm(running); err != nil {
		m.problem(fmt.Errorf("cannot confirm the system in slot %s: %w", running, err))
	}
}

func (m *machine) confirm(running string) error {
	dev, ok := data.Find("partlabel=esp")
	if !ok {
		return fmt.Errorf("there is no boot partition")
	}
	if err := m.modules.LoadAll("vfat", "nls_cp437", "nls_iso8859_1", "nls_ascii", "nls_utf8"); err != nil {
		return err
	}
	const at = "/run/cloudos/boot"
	if err := os.MkdirAll(at, 0o700); err != nil {
		return err
	}
	if err := unix.Mount(dev.Path, at, "vfat", unix.MS_NODEV|unix.MS_NOSUID|unix.MS_NOEXEC|unix.MS_SYNCHRONOUS, "umask=077"); err != nil {
		return fmt.Errorf("cannot mount the boot partition %s: %w", dev.Path, err)
	}
	defer unix.Unmount(at, 0)
	f, err := os.OpenFile(filepath.Join(at, slots.BlockFile), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, slots.Size)
	if _, err := io.ReadFull(f, b); err != nil {
		return err
	}
	s, err := slots.Parse(b)
	if err != nil {
		return err
	}
	if s.Fallen() && s.Try != running {
		m.problem(fmt.Errorf("the system in slot %s did not come up: slot %s runs instead", s.Try, running))
	}
	if s.Try != running {
		return nil
	}
	if b, err = s.Confirm(running).Block(); err != nil {
		return err
	}
	// In place: the boot loader knows the file's blocks.
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	m.log.Printf("the system in slot %s came up well and is kept", running)
	return nil
}
