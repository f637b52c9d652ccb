package source

import (
	"context"
	"encoding/base64"
	"errors"
	"net/http"
	"strings"
)

// provider is how a cloud tells a machine about itself.
type provider struct {
	name string
	// vendor, product and asset begin as the firmware says.
	vendor, product, asset string
	user, hostname         string
	header                 map[string]string
	// token is where a token is to be had first, tokenHeader how it is shown.
	token, tokenHeader string
	decode             func([]byte) ([]byte, error)
}

// The addresses: docs.aws.amazon.com "Use IMDSv2"; cloud.google.com "About VM
// metadata"; learn.microsoft.com "Azure Instance Metadata Service"; docs.digitalocean.com "Droplet metadata". A virtual
// machine of Hyper-V on somebody's computer differs from Azure's by the chassis' tag alone, and a Chromebook
// from Google's by the product.
var providers = []provider{
	{
		name: "aws", vendor: "Amazon EC2", user: "/latest/user-data", hostname: "/latest/meta-data/hostname",
		token: "/latest/api/token", tokenHeader: "X-aws-ec2-metadata-token",
	},
	{
		name: "gcp", vendor: "Google", product: "Google", user: "/computeMetadata/v1/instance/attributes/user-data", hostname: "/computeMetadata/v1/instance/hostname",
		header: map[string]string{"Metadata-Flavor": "Google"},
	},
	{
		name: "azure", vendor: "Microsoft Corporation", product: "Virtual Machine", asset: "7783-7084-3265-9085-8269-3286-77",
		user:     "/metadata/instance/compute/userData?api-version=2021-02-01&format=text",
		hostname: "/metadata/instance/compute/name?api-version=2021-02-01&format=text",
		header:   map[string]string{"Metadata": "true"}, decode: fromBase64,
	},
	{name: "digitalocean", vendor: "DigitalOcean", user: "/metadata/v1/user-data", hostname: "/metadata/v1/hostname"},
}

const metadataAddress = "http://169.254.169.254"

func fromBase64(b []byte) ([]byte, error) {
	return base64.StdEncoding.DecodeString(strings.TrimSpace(string(b)))
}

func (p *Places) cloud() *provider {
	for i, c := range providers {
		if p.Vendor != "" && strings.HasPrefix(p.Vendor, c.vendor) && strings.HasPrefix(p.Product, c.product) && strings.HasPrefix(p.Asset, c.asset) {
			return &providers[i]
		}
	}
	return nil
}

func (p *Places) ask(ctx context.Context, c *provider) (Found, error) {
	base := p.Endpoint
	if base == "" {
		base = metadataAddress
	}
	header := map[string]string{}
	for k, v := range c.header {
		header[k] = v
	}
	if c.token != "" {
		t, err := p.get(ctx, http.MethodPut, base+c.token, map[string]string{c.tokenHeader + "-ttl-seconds": "300"})
		if err != nil {
			return Found{}, err
		}
		header[c.tokenHeader] = strings.TrimSpace(string(t))
	}
	f := Found{}
	if name, err := p.get(ctx, http.MethodGet, base+c.hostname, header); err == nil {
		f.Hostname = strings.TrimSpace(string(name))
	} else if !errors.Is(err, errNothing) {
		return f, err
	}
	user, err := p.get(ctx, http.MethodGet, base+c.user, header)
	if errors.Is(err, errNothing) {
		return f, nil // nobody gave one
	}
	if err != nil {
		return f, err
	}
	if c.decode != nil {
		if user, err = c.decode(user); err != nil {
			return f, err
		}
	}
	if doc, ok := document(user); ok {
		f.Source, f.Document, f.Outside = c.name, doc, true
	} else if len(user) > 0 {
		p.Log("what the cloud has as user data is no document of this system: it is left alone")
	}
	return f, nil
}
