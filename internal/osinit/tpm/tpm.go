// Package tpm seals secrets with a TPM 2.0 (see package seal). The storage key is the
// standard one of the owner's hierarchy (ECC P-256, TCG's template), made anew each time:
// nothing is kept in the chip. Secrets travel to and from it encrypted. The program
// cloudos-seal imports it.
package tpm

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"

	"github.com/cloudos-io/cloudos/internal/osinit/seal"
)

// capText is what a register that is closed is extended with.
const capText = "cloudos: the data are open"

const device = "/dev/tpmrm0"

// Serve answers one request.
func Serve(in io.Reader, out io.Writer) error {
	var r seal.Request
	d := json.NewDecoder(io.LimitReader(in, 1<<20))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return fmt.Errorf("cannot read the request: %w", err)
	}
	chip, err := linuxtpm.Open(device)
	if errors.Is(err, os.ErrNotExist) {
		return errors.New("this machine has no TPM 2.0")
	}
	if err != nil {
		return fmt.Errorf("cannot use the TPM: %w", err)
	}
	defer chip.Close()
	answer, err := Answer(chip, r)
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(answer)
}

// Answer does what a request asks of a chip.
func Answer(chip transport.TPM, r seal.Request) (*seal.Response, error) {
	switch r.Op {
	case seal.Seal:
		s, err := sealTo(chip, r.PCRs, r.Values, r.Secret)
		if err != nil {
			return nil, fmt.Errorf("cannot seal a key with the TPM: %w", err)
		}
		return &seal.Response{Sealed: s}, nil
	case seal.Unseal:
		if r.Sealed == nil {
			return nil, errors.New("there is nothing to unseal")
		}
		b, err := unseal(chip, r.Sealed)
		if err != nil {
			return nil, fmt.Errorf("the TPM does not give out the key: %w", err)
		}
		return &seal.Response{Secret: b}, nil
	case seal.Cap:
		for _, n := range r.PCRs {
			sum := sha256.Sum256([]byte(capText))
			_, err := tpm2.PCRExtend{
				PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(n), Auth: tpm2.PasswordAuth(nil)},
				Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: sum[:]}}},
			}.Execute(chip)
			if err != nil {
				return nil, fmt.Errorf("cannot close the TPM's register %d: %w", n, err)
			}
		}
		return &seal.Response{}, nil
	}
	return nil, fmt.Errorf("there is no operation %q", r.Op)
}

func selection(pcrs []int) (tpm2.TPMLPCRSelection, error) {
	var list []uint
	for _, n := range pcrs {
		if n < 0 || n > 23 {
			return tpm2.TPMLPCRSelection{}, fmt.Errorf("there is no register %d", n)
		}
		list = append(list, uint(n))
	}
	if len(list) == 0 {
		return tpm2.TPMLPCRSelection{}, errors.New("no registers are named")
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(list...)}}}, nil
}

// values reads registers, one after the other: the chip answers with as many as it likes.
func values(chip transport.TPM, pcrs []int) ([][]byte, error) {
	var out [][]byte
	for _, n := range pcrs {
		sel, err := selection([]int{n})
		if err != nil {
			return nil, err
		}
		r, err := tpm2.PCRRead{PCRSelectionIn: sel}.Execute(chip)
		if err != nil {
			return nil, fmt.Errorf("cannot read the register %d: %w", n, err)
		}
		if len(r.PCRValues.Digests) != 1 || len(r.PCRValues.Digests[0].Buffer) != sha256.Size {
			return nil, errors.New("the chip has no registers for SHA-256: switch them on in the firmware")
		}
		out = append(out, r.PCRValues.Digests[0].Buffer)
	}
	return out, nil
}

// storage makes the storage key; done forgets it.
func storage(chip transport.TPM) (key tpm2.NamedHandle, salted tpm2.AuthOption, done func(), err error) {
	r, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(chip)
	if err != nil {
		return key, nil, nil, fmt.Errorf("cannot make the storage key: %w", err)
	}
	done = func() { tpm2.FlushContext{FlushHandle: r.ObjectHandle}.Execute(chip) }
	pub, err := r.OutPublic.Contents()
	if err != nil {
		done()
		return key, nil, nil, err
	}
	return tpm2.NamedHandle{Handle: r.ObjectHandle, Name: r.Name}, tpm2.Salted(r.ObjectHandle, *pub), done, nil
}

func sealTo(chip transport.TPM, pcrs []int, want [][]byte, secret []byte) (*seal.Sealed, error) {
	sel, err := selection(pcrs)
	if err != nil {
		return nil, err
	}
	if len(secret) == 0 || len(secret) > 128 {
		return nil, errors.New("the secret has a wrong length")
	}
	if want == nil {
		if want, err = values(chip, pcrs); err != nil {
			return nil, err
		}
	}
	policy, err := policyOf(sel, pcrs, want)
	if err != nil {
		return nil, err
	}
	key, salted, done, err := storage(chip)
	if err != nil {
		return nil, err
	}
	defer done()
	r, err := tpm2.Create{
		ParentHandle: tpm2.AuthHandle{Handle: key.Handle, Name: key.Name, Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.AESEncryption(128, tpm2.EncryptIn), salted)},
		InSensitive:  tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: secret})}},
		// No password opens it (UserWithAuth is off), the policy alone.
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256, AuthPolicy: tpm2.TPM2BDigest{Buffer: policy},
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true},
		}),
	}.Execute(chip)
	if err != nil {
		return nil, err
	}
	return &seal.Sealed{PCRs: pcrs, Values: want, Public: tpm2.Marshal(r.OutPublic), Private: tpm2.Marshal(r.OutPrivate)}, nil
}

// policyOf is the policy of registers with values: what the chip works out for itself when it is asked for the secret.
func policyOf(sel tpm2.TPMLPCRSelection, pcrs []int, want [][]byte) ([]byte, error) {
	if len(want) != len(pcrs) || !slices.IsSorted(pcrs) { // the chip takes them in order
		return nil, errors.New("the registers and their values do not belong together")
	}
	all := sha256.New()
	for _, v := range want {
		if len(v) != sha256.Size {
			return nil, errors.New("a register's value has a wrong length")
		}
		all.Write(v)
	}
	c, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	if err := (tpm2.PolicyPCR{PcrDigest: tpm2.TPM2BDigest{Buffer: all.Sum(nil)}, Pcrs: sel}).Update(c); err != nil {
		return nil, err
	}
	return c.Hash().Digest, nil
}

func unseal(chip transport.TPM, s *seal.Sealed) ([]byte, error) {
	sel, err := selection(s.PCRs)
	if err != nil {
		return nil, err
	}
	public, err := tpm2.Unmarshal[tpm2.TPM2BPublic](s.Public)
	if err != nil {
		return nil, fmt.Errorf("the sealed key is damaged: %w", err)
	}
	private, err := tpm2.Unmarshal[tpm2.TPM2BPrivate](s.Private)
	if err != nil {
		return nil, fmt.Errorf("the sealed key is damaged: %w", err)
	}
	key, salted, done, err := storage(chip)
	if err != nil {
		return nil, err
	}
	defer done()
	o, err := tpm2.Load{ParentHandle: tpm2.AuthHandle{Handle: key.Handle, Name: key.Name, Auth: tpm2.PasswordAuth(nil)}, InPublic: *public, InPrivate: *private}.Execute(chip)
	if err != nil {
		return nil, fmt.Errorf("it was sealed by another chip, or the chip was cleared: %w", err)
	}
	defer tpm2.FlushContext{FlushHandle: o.ObjectHandle}.Execute(chip)
	policy := func(t transport.TPM, h tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
		_, err := tpm2.PolicyPCR{PolicySession: h, Pcrs: sel}.Execute(t)
		return err
	}
	r, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{
		Handle: o.ObjectHandle, Name: o.Name, Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, policy, tpm2.AESEncryption(128, tpm2.EncryptOut), salted),
	}}.Execute(chip)
	if err != nil {
		return nil, err
	}
	return r.OutData.Buffer, nil
}
