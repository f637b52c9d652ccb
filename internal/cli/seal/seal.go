// Package seal encrypts and decrypts what leaves the command line for a disk, in
// the format of age (https://age-encryption.org/v1): the engine never sees the
// keys, and other tools can read the files. Package cli imports it.
package seal

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"filippo.io/age"
	"filippo.io/age/armor"
)

const (
	magic      = "age-encryption.org/v1"
	maxKeyFile = 1 << 20
)

// Recipients reads who is to be able to decrypt: public keys, and files of them.
func Recipients(keys, files []string) ([]age.Recipient, error) {
	var out []age.Recipient
	for _, k := range keys {
		r, err := age.ParseRecipients(strings.NewReader(k))
		if err != nil {
			return nil, fmt.Errorf("%q is no public key of age: %w", k, err)
		}
		out = append(out, r...)
	}
	for _, name := range files {
		b, err := readKeys(name)
		if err != nil {
			return nil, err
		}
		r, err := age.ParseRecipients(bytes.NewReader(b))
		if err != nil {
			return nil, fmt.Errorf("cannot read recipients of %s: %w", name, err)
		}
		out = append(out, r...)
	}
	return out, nil
}

// Passphrase makes a recipient of a passphrase.
func Passphrase(p string) (age.Recipient, error) { return age.NewScryptRecipient(p) }

// Identities reads private keys.
func Identities(files []string) ([]age.Identity, error) {
	var out []age.Identity
	for _, name := range files {
		b, err := readKeys(name)
		if err != nil {
			return nil, err
		}
		ids, err := age.ParseIdentities(bytes.NewReader(b))
		if err != nil {
			// Its text might show a part of the key.
			return nil, fmt.Errorf("%s holds no private key of age", name)
		}
		out = append(out, ids...)
	}
	return out, nil
}

func readKeys(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err == nil && len(b) > maxKeyFile {
		err = fmt.Errorf("%s is too large for a file of keys", name)
	}
	return b, err
}

// Encrypt gives what r holds, encrypted. Closing it closes r.
func Encrypt(r io.ReadCloser, to []age.Recipient) io.ReadCloser {
	pr, pw := io.Pipe()
	go func() {
		w, err := age.Encrypt(pw, to...)
		if err == nil {
			_, err = io.Copy(w, r)
		}
		if err == nil {
			err = w.Close()
		}
		pw.CloseWithError(err)
	}()
	return &piped{PipeReader: pr, under: r}
}

type piped struct {
	*io.PipeReader
	under io.Closer
}

func (p *piped) Close() error { return errors.Join(p.under.Close(), p.PipeReader.Close()) }

// Sealed looks at the beginning of r: whether it is encrypted, and with a
// passphrase. What it returns holds everything.
func Sealed(r io.Reader) (out io.Reader, sealed, passphrase bool) {
	br := bufio.NewReaderSize(r, 64<<10)
	b, _ := br.Peek(512)
	if bytes.HasPrefix(b, []byte(armor.Header)) {
		in := bufio.NewReaderSize(armor.NewReader(br), 64<<10)
		b, _ = in.Peek(512)
		return in, true, bytes.Contains(b, []byte("\n-> scrypt "))
	}
	return br, bytes.HasPrefix(b, []byte(magic)), bytes.Contains(b, []byte("\n-> scrypt "))
}

// Decrypt gives the content of what Encrypt made. Its reader fails where the file
// was damaged or cut off.
func Decrypt(r io.Reader, with []age.Identity) (io.Reader, error) {
	out, err := age.Decrypt(r, with...)
	var none *age.NoIdentityMatchError
	if errors.As(err, &none) {
		return nil, errors.New("none of the keys given opens it")
	}
	return out, err
}

// PassphraseIdentity opens what Passphrase sealed.
func PassphraseIdentity(p string) (age.Identity, error) { return age.NewScryptIdentity(p) }
