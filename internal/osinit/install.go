package osinit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/api/system"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osinit/config"
	"github.com/cloudos-io/cloudos/internal/osinit/data"
	"github.com/cloudos-io/cloudos/internal/osinit/install"
	"github.com/cloudos-io/cloudos/internal/osinit/source"
	"github.com/cloudos-io/cloudos/internal/osinit/upgrade"
	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// fromMedium tells whether the machine was started from a medium or over the network,
// and not from a disk with slots.
func (m *machine) fromMedium() bool {
	kind, _, _ := strings.Cut(m.cmdline["root"], "=")
	return m.cmdline["slot"] == "" && (kind == "iso" || kind == "initrd")
}

// installs tells whether the document asks for an installation that is still to be done.
func (m *machine) installs(doc *config.Document) bool {
	if doc.Install == nil {
		return false
	}
	if !m.fromMedium() {
		m.log.Printf("the document's section install is for media: this system is installed")
		return false
	}
	return true
}

// wantsInstall tells whether a document that is at hand asks for an installation, where the
// machine was started from a medium. Then what a disk keeps stays closed: the system there, and
// its document, may be what is to be overwritten.
func (m *machine) wantsInstall(ctx context.Context) bool {
	if !m.fromMedium() {
		return false
	}
	p := source.Places{CommandLine: m.cmdline["config"], Volumes: m.cidata, Image: config.InImage, Log: m.log.Printf}
	if p.Remote() {
		return false // it is asked later
	}
	f, err := p.Find(ctx)
	if err != nil || len(f.Document) == 0 {
		return false // whoever configures says what is wrong
	}
	doc, err := config.Parse(f.Document)
	return err == nil && doc.Install != nil
}

// install finds a disk, says what it found, writes the system to it, and stops the machine
// as the document says.
func (m *machine) install(ctx context.Context, doc *config.Document) {
	m.log.Printf("installing, as the document says")
	if err := m.installOn(ctx, doc); err != nil {
		if ctx.Err() == nil {
			m.problem(err)
			m.setState(vmwire.StateSafe)
		}
		return
	}
	reboot := doc.Install.Then != "poweroff"
	if reboot {
		m.log.Printf("the machine starts again: take the medium out, or let it start from the disk first")
	}
	m.Shutdown(reboot, 0)
}

func (m *machine) installOn(ctx context.Context, doc *config.Document) error {
	if err := m.canInstallEncrypted(doc.Encryption); err != nil {
		return err
	}
	if err := m.letGo(); err != nil {
		return err
	}
	if err := m.modules.Devices(); err != nil {
		m.log.Printf("%v", err)
	}
	disks, err := awaitDisks(ctx)
	if err != nil {
		return err
	}
	for _, d := range disks {
		m.log.Printf("disk     %s", d)
	}
	for _, l := range m.Status().Interfaces {
		m.log.Printf("network  %s  %s  %s", l.Name, l.MAC, strings.Join(l.Addresses, " "))
	}
	rule := install.Rule{Path: doc.Install.Disk.Path, Serial: doc.Install.Disk.Serial, Pick: doc.Install.Disk.Pick, Wipe: doc.Install.Disk.Wipe}
	if rule.MinSize, err = config.Bytes(doc.Install.Disk.MinSize); err != nil {
		return err
	}
	if rule.MaxSize, err = config.Bytes(doc.Install.Disk.MaxSize); err != nil {
		return err
	}
	sealed, parts, done, err := m.releaseSource(ctx, doc.Install.Source)
	if err != nil {
		return err
	}
	defer done()
	changes := newChanges(m)
	manifest, err := changes.judge(sealed, options{allowUnsigned: doc.Install.AllowUnsigned, allowDowngrade: true})
	if err != nil {
		return err
	}
	document := m.Config() // without secrets: what the disk's identity is made of is for everybody
	for _, d := range disks {
		if !d.Unfinished && d.ID == install.Identity(document, manifest, d) {
			return fault.New(fault.Conflict, "the system was installed on %s by this very document: take the medium out, and start the machine again", d.Path)
		}
	}
	disk, err := install.Choose(rule, disks)
	if err != nil {
		return err
	}
	m.mu.Lock()
	whole := m.document
	m.mu.Unlock()
	kept, err := config.Installed(whole)
	if err != nil {
		return err
	}
	change, err := json.Marshal(system.Change{Kind: "install", To: manifest.Version, Slot: "a", Outcome: system.Succeeded, Begun: time.Now().UTC(), Ended: time.Now().UTC()})
	if err != nil {
		return err
	}
	m.log.Printf("writing system %s to %s", manifest.Version, disk)
	last := time.Now()
	job := install.Job{
		Disk: disk, Manifest: manifest, Sealed: sealed, Parts: parts, Boot: changes.boot, DataAt: "/run/cloudos/data",
		Files: map[string][]byte{strings.TrimPrefix(configFile, "/var/"): kept, strings.TrimPrefix(changeFile, "/var/"): append(change, '\n')},
		Progress: func(step, part string, n, total int64) {
			if time.Since(last) > 2*time.Second {
				last = time.Now()
				m.log.Printf("%s %s: %d of %d MB", step, part, n/1e6, total/1e6)
			}
		},
	}
	if doc.Encryption.Key != "" {
		job.Encrypt = func(ctx context.Context, dev data.Device) (data.Device, error) {
			return m.encryptForInstalled(ctx, dev, doc.Encryption)
		}
	}
	if err := job.Write(ctx, install.Identity(document, manifest, disk)); err != nil {
		return err
	}
	m.log.Printf("system %s is installed on %s", manifest.Version, disk.Path)
	return nil
}

// letGo unmounts what is kept, which may be on the disk that is to be overwritten.
func (m *machine) letGo() error {
	m.mu.Lock()
	kind, dev := m.dataKind, m.data
	m.mu.Unlock()
	if kind != "disk" {
		return nil
	}
	if err := unix.Unmount("/var", 0); err != nil {
		return fmt.Errorf("cannot let go of the data disk: %w", err)
	}
	if err := dev.Close(); err != nil {
		return fmt.Errorf("cannot let go of the data disk: %w", err)
	}
	m.mu.Lock()
	m.data, m.dataKind = data.Device{}, "memory"
	m.mu.Unlock()
	return unix.Mount("var", "/var", "tmpfs", unix.MS_NODEV, "mode=755")
}

// awaitDisks waits until the list of disks has been the same for a while.
func awaitDisks(ctx context.Context) ([]install.Disk, error) {
	var last []install.Disk
	for range 20 {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Second):
		}
		disks, err := install.Disks()
		if err != nil {
			return nil, fmt.Errorf("cannot look for disks: %w", err)
		}
		if len(disks) > 0 && slices.Equal(disks, last) {
			return disks, nil
		}
		last = disks
	}
	return last, nil
}

// releaseSource opens the medium that the machine was started from, or fetches a release.
func (m *machine) releaseSource(ctx context.Context, from string) (sealed []byte, parts upgrade.Parts, done func(), err error) {
	if from != "" {
		m.mu.Lock()
		n := m.net
		m.mu.Unlock()
		select {
		case <-n.Online():
		case <-ctx.Done():
			return nil, nil, nil, ctx.Err()
		case <-time.After(time.Minute):
			return nil, nil, nil, fault.New(fault.Unavailable, "cannot fetch the release from %s: there is no network", from)
		}
		body, err := download(ctx, from)
		if err != nil {
			return nil, nil, nil, err
		}
		a, err := release.ReadArchive(body)
		if err != nil {
			body.Close()
			return nil, nil, nil, err
		}
		return a.Envelope(), a, func() { body.Close() }, nil
	}
	kind, label, _ := strings.Cut(m.cmdline["root"], "=")
	if kind != "iso" {
		return nil, nil, nil, fault.New(fault.Invalid, "cannot install: the machine was not started from a medium, so the document needs install.source")
	}
	dev, ok := data.FindISO(label)
	if !ok {
		return nil, nil, nil, fault.New(fault.NotFound, "cannot install: the medium %s is gone", label)
	}
	const at = "/run/cloudos/medium"
	if err := os.MkdirAll(at, 0o700); err != nil {
		return nil, nil, nil, err
	}
	if err := unix.Mount(dev, at, "iso9660", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID|unix.MS_NOEXEC, ""); err != nil && !errors.Is(err, unix.EBUSY) {
		return nil, nil, nil, fmt.Errorf("cannot mount the medium %s: %w", dev, err)
	}
	done = func() { unix.Unmount(at, unix.MNT_DETACH) }
	folder := medium(filepath.Join(at, "cloudos"))
	f, err := os.Open(filepath.Join(string(folder), release.EnvelopeFile))
	if err == nil {
		sealed, err = io.ReadAll(io.LimitReader(f, release.MaxEnvelope+1))
		f.Close()
	}
	if err != nil {
		done()
		return nil, nil, nil, fmt.Errorf("cannot read the release on the medium: %w", err)
	}
	return sealed, folder, done, nil
}

// medium is the folder of an ISO volume with a release's parts.
type medium string

// Open opens a part; its name is a manifest's, which has no slash.
func (d medium) Open(p *release.Part) (io.ReadCloser, error) {
	return os.Open(filepath.Join(string(d), p.Name))
}

// End has nothing to read.
func (medium) End() error { return nil }
