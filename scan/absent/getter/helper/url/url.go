// Package url has the name of go-getter's that grype and syft mention.
package url

import "net/url"

// Parse is net/url's.
func Parse(s string) (*url.URL, error) { return url.Parse(s) }
