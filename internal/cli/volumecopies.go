package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"filippo.io/age"
	"github.com/moby/moby/api/types/jsonstream"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/progress"
	"github.com/cloudos-io/cloudos/internal/cli/seal"
	"github.com/cloudos-io/cloudos/internal/cli/terminal"
)

// sealFlags say how a file is encrypted or opened.
type sealFlags struct {
	recipients, recipientFiles, identities []string
	passphrase                             bool
	passphraseFile                         string
}

func (o *sealFlags) declareSeal(f *command.FlagSet) {
	f.Strings(&o.recipients, "recipient", "r", "Encrypt to this public key of age (age1…)")
	f.Strings(&o.recipientFiles, "recipients-file", "R", "Encrypt to the public keys in a file").Of("file")
	f.Bool(&o.passphrase, "passphrase", "p", "Encrypt with a passphrase that is asked for")
	f.String(&o.passphraseFile, "passphrase-file", "", "Encrypt with the passphrase in a file").Of("file")
}

func (o *sealFlags) declareOpen(f *command.FlagSet) {
	f.Strings(&o.identities, "identity", "I", "File of private keys of age that opens the archive").Of("file")
	f.String(&o.passphraseFile, "passphrase-file", "", "File of the passphrase that opens the archive").Of("file")
}

// ask reads a passphrase from the file named, or from the terminal.
func (a *App) ask(file string, twice bool) (string, error) {
	if file != "" {
		b, err := os.ReadFile(file)
		if err != nil {
			return "", fmt.Errorf("cannot read the passphrase: %w", err)
		}
		p := strings.TrimRight(string(b), "\r\n")
		if p == "" {
			return "", errors.New("cannot use an empty passphrase")
		}
		return p, nil
	}
	if !terminal.Is(a.Stdin) {
		return "", errors.New("cannot ask for a passphrase: standard input is no terminal; use --passphrase-file")
	}
	fmt.Fprint(a.Stderr, "Passphrase: ")
	p, err := terminal.ReadPassword(a.Stdin)
	fmt.Fprintln(a.Stderr)
	if err == nil && p == "" {
		err = errors.New("cannot use an empty passphrase")
	}
	if err != nil || !twice {
		return p, err
	}
	fmt.Fprint(a.Stderr, "Again: ")
	q, err := terminal.ReadPassword(a.Stdin)
	fmt.Fprintln(a.Stderr)
	if err == nil && q != p {
		err = errors.New("the passphrases differ")
	}
	return p, err
}

// to is who can decrypt; nobody means that it is not encrypted.
func (a *App) to(o *sealFlags) ([]age.Recipient, error) {
	to, err := seal.Recipients(o.recipients, o.recipientFiles)
	if err != nil {
		return nil, err
	}
	if !o.passphrase && o.passphraseFile == "" {
		return to, nil
	}
	if len(to) > 0 {
		return nil, usagef("a passphrase excludes public keys")
	}
	p, err := a.ask(o.passphraseFile, true)
	if err != nil {
		return nil, err
	}
	r, err := seal.Passphrase(p)
	return []age.Recipient{r}, err
}

// unseal decrypts what is encrypted.
func (a *App) unseal(o *sealFlags, r io.Reader) (io.Reader, error) {
	r, sealed, withPassphrase := seal.Sealed(r)
	if !sealed {
		return r, nil
	}
	ids, err := seal.Identities(o.identities)
	if err != nil {
		return nil, err
	}
	switch {
	case withPassphrase:
		p, err := a.ask(o.passphraseFile, false)
		if err != nil {
			return nil, fmt.Errorf("the archive is encrypted: %w", err)
		}
		id, err := seal.PassphraseIdentity(p)
		if err != nil {
			return nil, err
		}
		ids = []age.Identity{id}
	case len(ids) == 0:
		return nil, errors.New("the archive is encrypted: name the file of the private key with --identity")
	}
	if r, err = seal.Decrypt(r, ids); err != nil {
		return nil, fmt.Errorf("cannot open the archive: %w", err)
	}
	return r, nil
}

// counted shows how much of a stream has passed.
type counted struct {
	io.Reader
	p        *progress.Writer
	what     string
	n, total int64
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b)
	c.n += int64(n)
	if c.p != nil {
		total := c.total
		if total < c.n {
			total = 0
		}
		_ = c.p.Show(client.Progress{ID: c.what, Status: "Copying", Progress: &jsonstream.Progress{Current: c.n, Total: total}})
	}
	return n, err
}

// counting counts on a terminal, unless it is to be quiet.
func (a *App) counting(what string, r io.Reader, total int64, quiet bool) (io.Reader, func()) {
	if quiet || !a.errIsTerminal() {
		return r, func() {}
	}
	p := a.progress(a.Stderr)
	return &counted{Reader: r, p: p, what: what, total: total}, func() { _ = p.Flush() }
}

func (a *App) cmdVolumeBackup() *command.Command {
	var o sealFlags
	out, pause, quiet := "", false, false
	return &command.Command{Name: "backup", Args: "VOLUME", Short: "Write a volume, compressed and with checksums, to a file", Min: 1, Max: 1, Complete: []string{"volume"},
		Example: "servin volumes backup --pause -o data.tar.zst data",
		Flags: func(f *command.FlagSet) {
			f.String(&out, "output", "o", "File to write").Of("file")
			f.Bool(&pause, "pause", "", "Pause the containers that run with the volume meanwhile")
			f.Bool(&quiet, "quiet", "q", "Do not show progress")
			o.declareSeal(f)
		},
		Run: func(ctx context.Context, args []string) error {
			to, err := a.to(&o)
			if err != nil {
				return err
			}
			return a.volumeOut(args[0], out, quiet, to, pause, func(c *client.Client, co client.CopyVolumeOptions) (io.ReadCloser, int64, error) {
				return c.VolumeBackup(ctx, args[0], co)
			})
		}}
}

// volumeOut writes a volume's stream to a file, made whole or not at all.
func (a *App) volumeOut(name, out string, quiet bool, to []age.Recipient, pause bool, open func(*client.Client, client.CopyVolumeOptions) (io.ReadCloser, int64, error)) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	done := func() {}
	err = a.writeStream(out, func() (io.ReadCloser, error) {
		r, size, err := open(c, client.CopyVolumeOptions{Pause: pause, Size: !quiet && a.errIsTerminal()})
		if err != nil {
			return nil, err
		}
		var in io.Reader
		in, done = a.counting(name, r, size, quiet)
		rc := struct {
			io.Reader
			io.Closer
		}{in, r}
		if len(to) > 0 {
			return seal.Encrypt(rc, to), nil
		}
		return rc, nil
	})
	done()
	return err
}

func (a *App) cmdVolumeExport() *command.Command {
	out, pause, quiet := "", false, false
	return &command.Command{Name: "export", Args: "VOLUME", Short: "Write a volume's content as a tar archive", Min: 1, Max: 1, Complete: []string{"volume"},
		Flags: func(f *command.FlagSet) {
			f.String(&out, "output", "o", "File to write").Of("file")
			f.Bool(&pause, "pause", "", "Pause the containers that run with the volume meanwhile")
			f.Bool(&quiet, "quiet", "q", "Do not show progress")
		},
		Run: func(ctx context.Context, args []string) error {
			return a.volumeOut(args[0], out, quiet, nil, pause, func(c *client.Client, co client.CopyVolumeOptions) (io.ReadCloser, int64, error) {
				return c.VolumeExport(ctx, args[0], co)
			})
		}}
}

// volumeIn opens what is to be read into a volume.
func (a *App) volumeIn(path string) (io.Reader, int64, func(), error) {
	if path == "" || path == "-" {
		if terminal.Is(a.Stdin) {
			return nil, 0, nil, errors.New("cannot read an archive from the terminal: name a file, or redirect the input")
		}
		return a.Stdin, 0, func() {}, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, nil, fmt.Errorf("cannot read the archive: %w", err)
	}
	var size int64
	if st, err := f.Stat(); err == nil && st.Mode().IsRegular() {
		size = st.Size()
	}
	return f, size, func() { f.Close() }, nil
}

func (a *App) cmdVolumeRestore() *command.Command {
	var o sealFlags
	var ro client.RestoreOptions
	in, quiet := "", false
	return &command.Command{Name: "restore", Args: "VOLUME", Short: "Make a volume, or replace its content, of a file that backup wrote", Min: 1, Max: 1, Complete: []string{"volume"},
		Example: "servin volumes restore -i data.tar.zst data2",
		Flags: func(f *command.FlagSet) {
			f.String(&in, "input", "i", "File to read instead of standard input").Of("file")
			f.Bool(&ro.Replace, "replace", "", "Replace what the volume holds, once the file was found whole")
			f.Bool(&ro.Devices, "devices", "", "Make device nodes that the file holds")
			f.Bool(&quiet, "quiet", "q", "Do not show progress")
			o.declareOpen(f)
		},
		Run: func(ctx context.Context, args []string) error {
			r, size, closeIn, err := a.volumeIn(in)
			if err != nil {
				return err
			}
			defer closeIn()
			r, done := a.counting(args[0], r, size, quiet)
			defer done()
			if r, err = a.unseal(&o, r); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			if _, err = c.VolumeRestore(ctx, args[0], ro, r); err == nil {
				done()
				fmt.Fprintln(a.out, args[0])
			}
			return err
		}}
}

func (a *App) cmdVolumeImport() *command.Command {
	var ro client.RestoreOptions
	quiet := false
	return &command.Command{Name: "import", Args: "VOLUME [FILE|-]", Short: "Make a volume, or replace its content, of a tar archive", Min: 1, Max: 2, Complete: []string{"volume", "file"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&ro.Replace, "replace", "", "Replace what the volume holds, once the archive was read to its end")
			f.Bool(&ro.Devices, "devices", "", "Make device nodes that the archive holds")
			f.Bool(&quiet, "quiet", "q", "Do not show progress")
		},
		Run: func(ctx context.Context, args []string) error {
			path := ""
			if len(args) == 2 {
				path = args[1]
			}
			r, size, closeIn, err := a.volumeIn(path)
			if err != nil {
				return err
			}
			defer closeIn()
			c, err := a.client()
			if err != nil {
				return err
			}
			r, done := a.counting(args[0], r, size, quiet)
			err = c.VolumeImport(ctx, args[0], ro, r)
			done()
			if err == nil {
				fmt.Fprintln(a.out, args[0])
			}
			return err
		}}
}

func (a *App) cmdVolumeClone() *command.Command {
	var o api.VolumeClone
	return &command.Command{Name: "clone", Args: "VOLUME NEW", Short: "Make a volume with the content of another one", Min: 2, Max: 2, Complete: []string{"volume", ""},
		Flags: func(f *command.FlagSet) {
			f.Bool(&o.Pause, "pause", "", "Pause the containers that run with the volume meanwhile")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			o.Name = args[1]
			v, err := c.VolumeClone(ctx, args[0], o)
			if err != nil {
				return err
			}
			fmt.Fprintln(a.out, v.Name)
			return nil
		}}
}
